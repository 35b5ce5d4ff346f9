"""The parts of HTML pages that the report and the law's page share: charts, SVG drawings and templates."""
