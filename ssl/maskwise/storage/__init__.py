"""Files in object storage and on web servers, through fsspec: ranges, retries, a bounded cache, uploads."""
