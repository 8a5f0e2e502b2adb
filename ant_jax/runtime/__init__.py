"""What a run needs from the machine: devices, processes, checkpoints, logs, files and signals."""
