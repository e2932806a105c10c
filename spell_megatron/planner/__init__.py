"""Will a run fit its GPUs, and how long will a step take? Answered on any machine, without weights."""
