"""The results as a static site, and as the board in the README."""

from thalweg.report.board import board, markdown_board
from thalweg.report.site import write_site

__all__ = ["board", "markdown_board", "write_site"]
