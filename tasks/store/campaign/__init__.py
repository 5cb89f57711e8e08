"""What Redis holds of campaigns beside what it holds of every job: sums, failures, batches, the results of forks."""
