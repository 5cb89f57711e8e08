"""What is measured: forkvm alone and through Redis, the other programs, and bare loops as the limit."""
