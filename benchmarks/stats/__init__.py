"""From records to figures. No server is asked, except by the command lossless."""
