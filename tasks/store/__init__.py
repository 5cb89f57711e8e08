"""What Redis holds of jobs, and notes on this host's disk for when Redis loses its last second.

`keys` is the table of all Redis keys. `results` composes the parts: `claims`, `final_results`, `pages`, `job_states`,
`cancellation`, `open_jobs`, `periodic_work` and `workers`, each over one `connection`. `campaign` holds what a campaign
has beside that, `lua` the scripts, `recent_forks` the notes on disk. `queues` counts messages in the broker's Redis;
`redis_errors` says which errors pass, and waits until they have.

It uses `tasks.contract`, `tasks.names` and `tasks.copier`.
"""
