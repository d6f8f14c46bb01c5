"""Webhooks: signed JSON by POST, one event a request (Standard Webhooks 1.0)."""
