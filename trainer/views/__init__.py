"""Looking at a run: the live page, the one-file report, attaching from a terminal.

Reads run folders; writes only `control.json` and `report.html`; asks only a run's worker.
"""
