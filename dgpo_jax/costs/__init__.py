"""What programs take, read from what the compiler made of them: for the dry run."""
