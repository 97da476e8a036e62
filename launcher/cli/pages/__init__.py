"""The HTML pages that commands write. Open html_page.py first."""
