"""What belongs to the whole process: the console, signals, torch's switches, the device's clock and memory."""
