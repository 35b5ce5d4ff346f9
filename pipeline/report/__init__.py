"""Reports the results of a run: one HTML page, the same numbers as JSON, and the final table as text.

manifests, results.json, metrics.csv --gather--> Report --> report.json
                                                   |------> table.txt, the terminal
                                                   '--charts, page--> report.html
"""
