"""Every option of every program, declared once; no torch."""
