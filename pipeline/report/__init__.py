"""What a run found, for people: one HTML file, the same numbers as JSON, and the final table as text.

manifests, results.json, metrics.csv --gather--> Report --> report.json
                                                   |------> table.txt, the terminal
                                                   '--charts, page--> report.html
"""
