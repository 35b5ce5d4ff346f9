"""The law of capacity gap: which teacher is best for a student, measured over a grid of runs.

table (JSON lines) --fit--> law.json --report--> law.html
                               '------advise---> which teacher to choose for a student that was not trained yet
"""
