"""The ops inside other libraries' models and trainers, one module a library.

Nothing is imported here: each module needs its library, and is imported on request.
docs/integrations.md has what each does, and its errors against the library's own path.
"""
