"""Plan, loop, step, resume, out-of-memory, several processes, memory prediction."""
