"""Connection to Ray and work that is handed to a cluster."""
