"""Many forks of one source as one job: `forkvm.campaign`, its batches, and what Redis keeps of it."""
