package config

// Listener is one door for devices.
type Listener struct {
	Name     string      `yaml:"name"`
	Protocol string      `yaml:"protocol"` // mqtt, mqtts, ws, wss
	Address  string      `yaml:"address"`
	TLS      ListenerTLS `yaml:"tls"`
}

// ListenerTLS is what a listener shows and asks for.
type ListenerTLS struct {
	Cert              string `yaml:"cert"`
	Key               string `yaml:"key"`
	ClientCA          string `yaml:"client_ca"`
	RequireClientCert bool   `yaml:"require_client_cert"`
}
