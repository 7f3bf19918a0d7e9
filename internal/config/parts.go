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

// Upstream is one place that messages go to.
type Upstream struct {
	Name         string      `yaml:"name"`
	URL          string      `yaml:"url"`
	Format       string      `yaml:"format"`
	TopicPrefix  string      `yaml:"topic_prefix"`
	Username     string      `yaml:"username"`
	PasswordFile string      `yaml:"password_file"`
	TLS          UpstreamTLS `yaml:"tls"`
	Lanes        []string    `yaml:"lanes"`
	Window       int         `yaml:"window"`
	Commands     bool        `yaml:"commands"`
}

// UpstreamTLS is whom to trust and what to show.
type UpstreamTLS struct {
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}
