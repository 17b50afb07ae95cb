"""What carries a guest: each module boots a built kernel for a job, as a process of the host."""
