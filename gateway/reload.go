package gateway

import (
	"fmt"
	"reflect"

	"holdfast/internal/config"
)

// Reload takes what of a configuration may change while the gateway runs: roles with their limits, who may connect
// anonymously, and the certificates, authorities and revocation lists of the listeners, which are read from their files
// again. Connections that are still allowed stay. What is wrong leaves everything as it was and is told in the error. later
// names the keys that have changed as well and need a restart.
func (g *Gateway) Reload(cfg *config.Config) (later []string, err error) {
	g.reloading.Lock()
	defer g.reloading.Unlock()
	for i := range cfg.Devices.Roles { // what SetPolicy would refuse, before anything is taken
		if err := cfg.Devices.Roles[i].Validate(); err != nil {
			return nil, fmt.Errorf("devices.roles: %w", err)
		}
	}
	// The new configuration was held to this with its own listeners; those that are open stay until a restart.
	if cfg.Devices.Anonymous && !cfg.Devices.AllowAnonymousOnNetwork {
		for i := range g.cfg.Listeners {
			if l := &g.cfg.Listeners[i]; !config.Loopback(l.Address) {
				return nil, fmt.Errorf("devices.anonymous would let everybody in by listener %s, which is still open at %s: restart to have the new listeners, "+
					"or set devices.allow_anonymous_on_network to true if the network itself keeps strangers out", l.Name, l.Address)
			}
		}
	}
	if err := g.broker.ReloadTLS(); err != nil {
		return nil, err
	}
	if err := g.devices.SetPolicy(cfg.Devices.Roles, cfg.Devices.Anonymous); err != nil {
		return nil, fmt.Errorf("devices.roles: %w", err)
	}
	g.cfg.Devices.Roles, g.cfg.Devices.Anonymous = cfg.Devices.Roles, cfg.Devices.Anonymous
	g.broker.Recheck()
	return g.needRestart(cfg), nil
}

// needRestart names the keys whose values differ from those that the gateway works with.
func (g *Gateway) needRestart(cfg *config.Config) (keys []string) {
	for _, k := range []struct {
		key      string
		now, new any
	}{
		{"gateway", g.cfg.Gateway, cfg.Gateway},
		{"listeners", g.cfg.Listeners, cfg.Listeners},
		{"devices.commands", g.cfg.Devices.Commands, cfg.Devices.Commands},
		{"spool", g.cfg.Spool, cfg.Spool},
		{"routes", g.cfg.Routes, cfg.Routes},
		{"upstreams", g.cfg.Upstreams, cfg.Upstreams},
		{"http", g.cfg.HTTP, cfg.HTTP},
		{"log", g.cfg.Log, cfg.Log},
	} {
		if !reflect.DeepEqual(k.now, k.new) {
			keys = append(keys, k.key)
		}
	}
	return keys
}
