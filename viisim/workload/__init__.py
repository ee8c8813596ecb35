"""Where requests come from: synthetic generators and recorded traces."""
