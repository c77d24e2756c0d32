"""Rows with roles: datasets on disk, catalogues, request traces, the event log, samples."""
