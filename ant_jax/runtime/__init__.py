"""What a run stands on: devices, processes, checkpoints, logs, files and signals."""
