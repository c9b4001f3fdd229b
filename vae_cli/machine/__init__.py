"""The machine that a run uses: its devices, memory and cores, and the processes that train a run together."""

__all__ = ["cores", "device", "distributed", "graphs", "launch", "memory", "signals"]
