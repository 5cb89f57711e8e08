"""What the kernel is asked, a file for each call or ladder of calls: what a refusal means, and no policy."""
