"""What happened: entries, events, a recorder for each rank, and export to Chrome's and Perfetto's trace format."""
