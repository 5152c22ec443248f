"""The certificate: how far an answer can be trusted, judged by the stack alone."""
