"""What a run reports: metrics, journal, pictures, summary, and the plan of `--dry-run`."""
