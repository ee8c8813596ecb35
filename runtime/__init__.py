"""Deploy: the same policies, asked through the same core, in front of real workers."""
