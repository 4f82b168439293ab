"""Where and how runs are started. A launcher turns written configs into finished run directories."""
