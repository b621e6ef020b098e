"""From records to figures. No server is asked, except by lossless_check."""
