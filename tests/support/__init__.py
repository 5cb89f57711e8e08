"""What tests look at and make, written without the program's own code, so that it can judge that code."""
