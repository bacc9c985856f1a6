"""What depends on the machine: devices, processes, memory, terminal, signals."""
