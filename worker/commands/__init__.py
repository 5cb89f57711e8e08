"""The commands of `forkvm`: one module for each group of commands, and what they share.

    fork         fork, estimate, verify: in this process, without a broker
    queue        submit, status, files, cancel
    campaign     campaign, forks
    report       report
    watch        queues, top
    worker       worker, demo, copy-rate
    interface    completion, schema: what shells and other programs need to know of forkvm
    demo         what `forkvm demo` does
    doctor, gc   the commands of these names
    options      options, and the requests and settings that they make
    help         the example and the exit codes in a command's help
    output       results as text, and the progress bar
    waiting      waiting for the result of a queued job
    errors       the message and the exit code of an error

It may use everything but `worker.cli`. A command's module is imported when the command is called, and for the help. It
therefore imports what does its work (the engine, Celery, pydantic, rich) in its functions, so that each command starts
without what the others need.
"""
