"""What may go wrong around a run: kills, full disks, data that vanish, processes that die."""
