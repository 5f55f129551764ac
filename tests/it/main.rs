mod cluster_client;
