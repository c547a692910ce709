"""The report: results.json, Markdown with figures, and one HTML page. Imports no torch."""
