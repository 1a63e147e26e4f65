"""What `bench` needs: the works that are measured, ours and those of others, and how they take turns."""
