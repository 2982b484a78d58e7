"""From the scores that models give to candidates, to figures with their uncertainty and a report.

`metrics` holds the arithmetic (numpy alone), `report` writes `metrics.json`, the terminal tables and the page
`report.html`, `figures` draws that page's charts. Nothing is imported here, so that each can be had without the others.
"""
