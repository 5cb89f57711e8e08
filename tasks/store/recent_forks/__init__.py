"""Notes about forks that succeeded on this host in the last minutes, for when Redis has lost their results.

A Redis that is killed loses its last second (`appendfsync everysec`); one that is restored from a backup loses more. A
fork that succeeded in that time is delivered again, and its own destination is then in its way. The notes show that the
destination is the fork's: they hold the id, a digest of the request, the identity of the published directory, and the
result. They are in the temporary directory, because nothing of a fork may be left beside its destination. Workers of
other hosts do not see them.

`forks` and `campaign_forks` write and use the notes; `record` is the format of one, `files` that of the files.
"""
