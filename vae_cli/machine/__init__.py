"""The machine that a run computes on: devices, memory, cores, and the processes of one run."""

__all__ = ["cores", "device", "distributed", "graphs", "launch", "memory"]
