"""Serving: an API in the forms that clients speak already, and a page that uses it."""
