package devices

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"holdfast/internal/kv"
)

// RegistryConfig of a Registry.
type RegistryConfig struct {
	Journal   Journal
	Roles     []Role // besides the built-in ones, or instead of one of the same name
	Anonymous bool   // whoever is not registered may connect under any client id that is a device id
	Log       *slog.Logger
	Metrics   prometheus.Registerer // nil: none
	Now       func() time.Time      // nil: time.Now
	// Kick is called, from any goroutine, when a device may no longer be connected (disabled, removed, its credentials gone): it ends
	// the device's connections at once. forget: the broker's session of it is to go, too. It does not block.
	Kick func(device, reason string, forget bool)
}

// Registry of devices. All methods may be called from many goroutines. Those that change something return when that is
// on stable storage.
type Registry struct{}

// OpenRegistry opens the registry in store. It takes the same time for no device and for 100,000: rows are read when they are needed.
func OpenRegistry(store *kv.Store, cfg RegistryConfig) (*Registry, error) { panic("not built") }

// Add registers a device. secret is the generated token, shown this once; "" if none was made.
func (r *Registry) Add(ctx context.Context, d NewDevice) (dev Device, secret string, err error) {
	panic("not built")
}

// Get returns a device. ErrUnknownDevice.
func (r *Registry) Get(id string) (Device, error) { panic("not built") }

// Known says whether commands may be submitted for a device, and if not, ErrUnknownDevice, ErrBadID or ErrDisabled.
func (r *Registry) Known(id string) error { panic("not built") }

// DeviceFilter chooses devices.
type DeviceFilter struct {
	After     string // only ids after this one
	Limit     int    // at most; 0: 100
	Search    string // in id, name or a label's value, case-insensitive
	Role      string
	Connected *bool
	Enabled   *bool
	Label     string // key or key=value
}

// List returns devices by id. next is what to give as After for the following page; "": that was the last.
func (r *Registry) List(f DeviceFilter) (page []Device, next string, err error) { panic("not built") }

// Patch changes a device. Disabling it ends its connection.
func (r *Registry) Patch(ctx context.Context, id string, p DevicePatch) (Device, error) {
	panic("not built")
}

// Remove forgets a device and ends its connection.
func (r *Registry) Remove(ctx context.Context, id string) error { panic("not built") }

// AddCredential adds a credential; see NewCredential. secret as in Add.
func (r *Registry) AddCredential(ctx context.Context, id string, c NewCredential) (made Credential, secret string, err error) {
	panic("not built")
}

// RemoveCredential revokes one. Who is connected with it is disconnected.
func (r *Registry) RemoveCredential(ctx context.Context, id, credential string) error {
	panic("not built")
}

// Authenticate lets a client in or not: ErrCredentials, ErrDisabled, ErrBadID. It takes the same time for an unknown device as for a
// wrong password.
func (r *Registry) Authenticate(a *Attempt) (*Identity, error) { panic("not built") }

// Identity is a device that was let in, or one that is known.
type Identity struct{}

// MayPublish says whether it may publish to topic. It allocates nothing and follows changes of its role at once.
func (i *Identity) MayPublish(topic []byte) bool { panic("not built") }

// MaySubscribe says whether it may subscribe to filter (without $share/name/), or get a message on the topic filter.
func (i *Identity) MaySubscribe(filter string) bool { panic("not built") }

// Limits of the device now.
func (i *Identity) Limits() Limits { panic("not built") }

// Identity of a device that is not connecting now: of a session that is restored, of a will that waited. A device that is not
// known, or disabled, may nothing.
func (r *Registry) Identity(device string) *Identity { panic("not built") }

// SetPolicy replaces roles and the anonymous rule while running: configuration was read again.
func (r *Registry) SetPolicy(roles []Role, anonymous bool) error { panic("not built") }

// Connected notes that a device is here. The token names this connection. It registers an anonymous device.
func (r *Registry) Connected(device string, c Connection) (token uint64) { panic("not built") }

// Disconnected notes that the connection token has ended. If a newer one of the device is there, nothing changes.
func (r *Registry) Disconnected(device string, token uint64, reason string) { panic("not built") }

// Counts of devices.
type Counts struct {
	Registered int `json:"registered"`
	Connected  int `json:"connected"`
	Disabled   int `json:"disabled"`
}

// Counts of devices at this moment. Cheap.
func (r *Registry) Counts() Counts { panic("not built") }

// Run does what needs time: it tells of devices that a crash of the gateway has disconnected, forgets expired credentials and disconnects who used them.
func (r *Registry) Run(ctx context.Context) error { panic("not built") }
