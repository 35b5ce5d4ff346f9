"""What HTML pages are made of: charts, SVG and templates; the report and the law's page share them."""
