"""From rows to statistics, tables, figures and the page. Imports no torch."""
