"""What a run shows and keeps while it runs: measurements, log, journal, live line, Prometheus and the report.

Nothing here changes a run: the training loop pushes numbers in and never reads any back. Each file is one way out.
"""
