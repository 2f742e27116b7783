"""A die is thrown; no paper says so."""
