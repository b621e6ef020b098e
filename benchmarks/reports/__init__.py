"""Figures to text, tables and pictures. Knows no command."""
