"""What a run says: metrics, journal, pictures, summary, and the plan of `--dry-run`."""
